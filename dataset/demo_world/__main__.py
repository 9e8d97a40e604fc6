"""python -m dataset.demo_world --out dataset/demo"""

from dataset.demo_world.build import main
from trainer.script import clean_exit

clean_exit(main)
