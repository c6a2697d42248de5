"""An infilling model with GPT-2's tokens, with the sizes and schedule of the project TinyStoriesProject.

33.5M parameters with 50,259 tokens, 19.3M of them in the embedding. For a model of your own take
config/infill.py instead.

    python data/tiny_stories/prepare.py --encoding_type gpt2 --infill_rate 0.5
    python train.py config/infill_33m.py --device cuda
"""

out_dir = 'out-infill-33m'

block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
mlp_width = 1536
dropout = 0.1

batch_size = 32  # 8,192 tokens per step
max_epochs = 10
optimizer = 'adamw'
learning_rate = 1e-4
eval_interval = 0  # evaluate once per epoch
