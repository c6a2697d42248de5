"""llama2.c's stories260K: 260K parameters at 512 tokens; small enough to test programs with.

    python data/tiny_stories/prepare.py --encoding_type bpe --vocab_size 512
    python train.py config/llama_260k.py
"""

out_dir = 'out-llama-260k'

block_size = 512
n_layer = 5
n_head = 8
n_kv_head = 4
n_embd = 64
mlp_width = 172

batch_size = 128  # 65,536 tokens a step
max_iters = 20000  # llama2.c took 100,000, with AdamW
warmup_iters = 200
eval_interval = 1000
