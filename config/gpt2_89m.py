"""A model close to the Transformer of 2017 (sinusoidal positions, ReLU, dropout), with GPT-2's tokens.

LayerNorm comes before each sublayer, not after it as in 2017. 89.3M parameters with 50,259 tokens, 51.5M of
them in the embedding and the head, which are not tied.

    python data/tiny_stories/prepare.py --encoding_type gpt2
    python train.py config/gpt2_89m.py
"""

out_dir = 'out-gpt2-89m'

block_size = 512
n_layer = 12
n_head = 8
n_embd = 512
norm = 'layer'
position = 'sinusoidal'
mlp = 'relu'
bias = True
tie_embeddings = False
dropout = 0.1

batch_size = 32
gradient_accumulation_steps = 8
max_iters = 10000
warmup_iters = 500
optimizer = 'adamw'
learning_rate = 6e-4
eval_interval = 1000
