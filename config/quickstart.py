"""A small model that trains in two minutes on two CPU cores.

1.0M parameters with the built-in corpus's 1,536 tokens.

    python data/tiny_stories/prepare.py --source sample
    python train.py config/quickstart.py
"""

out_dir = 'out-quickstart'
overwrite = True  # re-running this recipe replaces the previous run

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 8
max_iters = 1500
warmup_iters = 20
learning_rate = 0.01
eval_interval = 250
log_interval = 50
