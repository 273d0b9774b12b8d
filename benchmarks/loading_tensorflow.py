"""Time how TensorFlow reads every variable of a checkpoint, as the book does. loading.py starts this script."""

import json
import sys
import time

import numpy as np
import tensorflow as tf
from memory import Peak

with Peak() as peak:
    start = time.perf_counter()
    names = [name for name, _ in tf.train.list_variables(sys.argv[1])]
    arrays = {name: np.squeeze(tf.train.load_variable(sys.argv[1], name)) for name in names}
    total = sum(float(array.sum()) for array in arrays.values())
    seconds = time.perf_counter() - start
print(json.dumps([seconds, peak.n_bytes]))
