"""The real TinyStories on one GPU, in an estimated hour on an A100.

25.5M parameters with char, 27.4M with bpe's 4,096 tokens, 51.0M with gpt2's 50,259.

    python data/tiny_stories/prepare.py
    python train.py config/tiny_stories.py --device cuda
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py

Why this size: training on one token costs 0.19 GFLOP with 27.4M parameters, so the 2.6 billion tokens of
this run cost 5e17 FLOP. That is one hour at 140 TFLOP/s, which is 45% of an A100's peak (an estimate, not a
measurement). For that budget, Chinchilla's rule of 20 tokens per parameter suggests about 65M parameters and
half the tokens. The loss is flat around that optimum, and the smaller model generates twice as fast, also on
a laptop. If you have less time, take fewer steps (--max_iters 3000).
"""

out_dir = 'out-tiny-stories'

block_size = 512
n_layer = 8
n_head = 8
n_embd = 512

batch_size = 64
gradient_accumulation_steps = 8  # 262,144 tokens per step, on any number of GPUs
max_iters = 10000  # 2.6 billion tokens: 1.4 epochs with char, more with bpe and gpt2
warmup_iters = 200
eval_interval = 1000
