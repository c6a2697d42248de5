"""The real TinyStories on one GPU, in about an hour of an A100.

25.5M parameters with characters, 27.4M with bpe's 4,096 tokens, 51.0M with gpt2's 50,259.

    python data/tiny_stories/prepare.py
    python train.py config/tiny_stories.py --device cuda
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py

Why this size: a token costs 0.19 GFLOP at 27.4M parameters, so the 2.6 billion tokens of this run are 5e17,
an hour at the 140 TFLOP/s that 45% of an A100's peak would be (reckoned, not measured). By Chinchilla's 20
tokens a parameter it would be 65M parameters and half the tokens; the loss is flat around that optimum, and
the smaller model writes twice as fast, also on a laptop. With less time take fewer steps (--max_iters 3000).
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
