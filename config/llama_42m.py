"""The shape of llama2.c's stories42M.

41.7M parameters with 32,000 tokens, 16.4M of them in the embedding; 27.4M parameters with 4,096 tokens.

    python data/tiny_stories/prepare.py --encoding_type bpe --vocab_size 32000
    python train.py config/llama_42m.py --device cuda
"""

out_dir = 'out-llama-42m'

block_size = 1024
n_layer = 8
n_head = 8
n_embd = 512
mlp_width = 1376

batch_size = 32
gradient_accumulation_steps = 4  # 131,072 tokens per step
max_iters = 20000
warmup_iters = 200
eval_interval = 1000
