"""An infilling model: it writes the middle of a story between a given first and last sentence.

15.7M parameters with bpe's 4,096 tokens.

    python data/tiny_stories/prepare.py --encoding_type bpe --infill_rate 0.5
    python train.py config/infill.py --device cuda
    python sample.py --out_dir out-infill --first_sentence "..." --last_sentence "..."
"""

out_dir = 'out-infill'

block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
mlp_width = 1536
dropout = 0.1

batch_size = 64
gradient_accumulation_steps = 4  # 65,536 tokens per step
max_iters = 20000
warmup_iters = 200
eval_interval = 1000
