"""The shape of llama2.c's stories110M.

109.5M parameters with 32,000 tokens, 24.6M of them in the embedding; 88.1M parameters with 4,096 tokens.

    python data/tiny_stories/prepare.py --encoding_type bpe --vocab_size 32000
    torchrun --standalone --nproc_per_node=4 train.py config/llama_110m.py
"""

out_dir = 'out-llama-110m'

block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
mlp_width = 2048
dropout = 0.1

batch_size = 16
gradient_accumulation_steps = 8  # 131,072 tokens per step
max_iters = 20000  # llama2.c trained for 200,000 steps, with AdamW
warmup_iters = 200
eval_interval = 1000
