"""What accelerators would run: functions compiled for GPU and TPU without one, their programs read, their time bounded.

    python -m benchmarks compiled [--chip h100|v5e|v6e] [NAME...]

`text` parses a compiled program, `cost` counts what it moves and multiplies, `chips` compiles for a chip, `rows` is the
table of functions and their twins, `table` prints it. In a script:

    from benchmarks.compiled.chips import measure
    print(measure(jax.nn.softmax, jax.ShapeDtypeStruct((8192, 4096), "float32"), chip="h100"))
"""
