"""The same rules and the same plan over ONNX graphs: read, translated, planned as ATen, and written back as ONNX.

There is no second algebra. A graph's operators become ATen operators where the two mean the same, and operators that
nothing is known of otherwise; the plan is made on that, and what it takes is written into a copy of the ONNX graph.
Importing this package imports no onnx: its modules do, when a file is opened.
"""
