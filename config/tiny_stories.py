"""The real TinyStories on one GPU.

25.5M parameters with characters, 27.4M with bpe's 4,096 tokens, 51.0M with gpt2's 50,259.

    python data/tiny_stories/prepare.py
    python train.py config/tiny_stories.py --device cuda
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py
"""

out_dir = 'out-tiny-stories'

block_size = 512
n_layer = 8
n_head = 8
n_embd = 512

batch_size = 64
gradient_accumulation_steps = 8  # 262,144 tokens a step on one GPU as on eight
max_iters = 10000  # 2.6 billion tokens: 1.4 epochs of characters, more of the others
warmup_iters = 200
eval_interval = 1000
