"""Writes odd.ckpt and expected.npz into the current directory. Needs tensorflow-cpu 2.21, which the tests do not."""

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1
random = np.random.default_rng(7)
VALUES = {
    "flag": (True, tf.bool),  # one byte, so that what follows lies at odd addresses
    "half": (random.normal(size=(3, 5)), tf.float16),
    "bf16": (random.normal(size=(7, 3)), tf.bfloat16),
    "bf16_special": ([np.nan, np.inf, -np.inf, -0.0, 1e-40, 3.0e38], tf.bfloat16),
    "double": (random.normal(size=(2, 2, 2)), tf.float64),
    "single": (random.normal(size=(1, 4, 6)), tf.float32),
    "i8": (random.integers(-(2**7), 2**7, 5), tf.int8),
    "i16": (random.integers(-(2**15), 2**15, 5), tf.int16),
    "i32": (random.integers(-(2**31), 2**31, 5), tf.int32),
    "i64": (random.integers(-(2**63), 2**63 - 1, 5), tf.int64),
    "u8": (random.integers(0, 2**8, 5), tf.uint8),
    "u16": (random.integers(0, 2**16, 5), tf.uint16),
    "bools": ([True, False, True], tf.bool),
    "c64": (random.normal(size=3) + 1j, tf.complex64),
    "scalar": (-1.5, tf.float32),
    "global_step": (12345678901, tf.int64),
    "empty": (np.zeros((0, 4)), tf.float32),
    "text": (["abc", "defg"], tf.string),
    "scope/with/long/" + "x" * 120: ([1.0], tf.float32),
    **{
        f"many/{i:02d}": (np.float32(i), tf.float32) for i in range(18)
    },  # past a restart point, which comes every 16 keys
}
with tf.Graph().as_default(), tf1.Session() as session:
    for name, (value, dtype) in VALUES.items():
        tf1.get_variable(name, initializer=tf.constant(value, dtype=dtype))
    with tf1.variable_scope("part", partitioner=tf1.fixed_size_partitioner(2)):
        tf1.get_variable("w", shape=(6, 2), initializer=tf1.ones_initializer())
    session.run(tf1.global_variables_initializer())
    tf1.train.Saver().save(session, "./odd.ckpt", write_meta_graph=False)
reader = tf.train.load_checkpoint("./odd.ckpt")
arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if name != "text"}
np.savez_compressed(
    "expected.npz",
    **{
        name.replace("/", "|"): array.astype(np.float32) if array.dtype == tf.bfloat16 else array
        for name, array in arrays.items()
    },
)
