"""A small character-level model: 0.97M parameters at TinyStories' 350 characters.

    python data/tiny_stories/prepare.py
    python train.py config/char_1m.py
"""

out_dir = 'out-char-1m'

block_size = 256
n_layer = 5
n_head = 8
n_kv_head = 4
n_embd = 128

batch_size = 64  # 16,384 tokens per step
max_iters = 20000
eval_interval = 1000
