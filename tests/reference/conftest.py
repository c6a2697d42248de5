"""Have the scripts of these tests start sooner: prepare.py imports `datasets`, which imports pandas."""

from tests.tiny import forks

forks.set_forkserver_preload(['pytest', 'matplotlib.figure', 'torch._dynamo', 'torch.distributed', 'pandas',
                              'requests'])
