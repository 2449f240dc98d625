"""Contenders of the speed benchmarks: each runs in a process of its own and answers commands, one at a time.

`processes` talks to them, `worker` is what runs in them, `rounds` lets them take turns, `report` writes tables, and
`torch_scorer`, `ctranslate2_scorer`, `onnx_scorer`, `ours_scorer`, `torch_trainer`, `ours_trainer` are the engines.
"""
