"""The parts of ``lorasculpt compare``: its runs, what a label stands for, and what the runs say together."""
