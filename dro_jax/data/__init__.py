"""Feedback files, the SeqIO task over them, and the batches that training and evaluation read.

`feedback` and `demonstration` run without TensorFlow; the other modules import SeqIO.
"""
