"""Two wide layers with GPT-2's tokens.

85.9M parameters with 50,259 tokens, 77.2M of them in the embedding and the head.

    python data/tiny_stories/prepare.py --encoding_type gpt2
    python train.py config/gpt2_2layer.py --device cuda
"""

out_dir = 'out-gpt2-2layer'

block_size = 1024  # as in GPT-2
n_layer = 2
n_head = 12
n_embd = 768
norm = 'layer'
position = 'learned'
mlp = 'gelu'
mlp_width = 1024
bias = True
tie_embeddings = False

batch_size = 8
gradient_accumulation_steps = 2  # 16,384 tokens per step
max_epochs = 5
optimizer = 'adamw'
learning_rate = 3e-4
eval_interval = 0  # evaluate once per epoch
