"""A small infilling model that trains in three minutes on two CPU cores.

It writes the middle of a story between a given first and last sentence. 1.0M parameters with the built-in
corpus's 1,536 tokens.

    python data/tiny_stories/prepare.py --source sample --infill_rate 0.5
    python train.py config/quickstart_infill.py
    python sample.py --out_dir out-quickstart-infill --first_sentence "..." --last_sentence "..."
"""

out_dir = 'out-quickstart-infill'
overwrite = True  # re-running this recipe replaces the previous run

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 8
max_iters = 2000
warmup_iters = 20
learning_rate = 0.01
eval_interval = 500
log_interval = 50
