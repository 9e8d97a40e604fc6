"""python -m dataset.demo_world --out dataset/demo"""
from dataset.demo_world.build import main
from trainer.args import clean_exit

clean_exit(main)
