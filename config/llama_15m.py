"""The shape of llama2.c's stories15M.

15.2M parameters with 32,000 tokens, 9.2M of them in the embedding; 7.2M parameters with 4,096 tokens.

    python data/tiny_stories/prepare.py --encoding_type bpe --vocab_size 32000
    python train.py config/llama_15m.py --device cuda
"""

out_dir = 'out-llama-15m'

block_size = 256
n_layer = 6
n_head = 6
n_embd = 288
mlp_width = 768

batch_size = 128
gradient_accumulation_steps = 4  # 131,072 tokens per step
max_iters = 20000  # llama2.c trained for 100,000 steps, with AdamW
warmup_iters = 200
eval_interval = 1000
