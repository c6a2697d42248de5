"""The shape of llama2.c's stories260K, small enough to test programs with.

260K parameters with 512 tokens.

    python data/tiny_stories/prepare.py --encoding_type bpe --vocab_size 512
    python train.py config/llama_260k.py
"""

out_dir = 'out-llama-260k'

block_size = 512
n_layer = 5
n_head = 8
n_kv_head = 4
n_embd = 64
mlp_width = 172

batch_size = 128  # 65,536 tokens per step
max_iters = 20000  # llama2.c trained for 100,000 steps, with AdamW
warmup_iters = 200
eval_interval = 1000
