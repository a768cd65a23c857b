"""The parts of ``lorasculpt compare``: what a label stands for, and what the runs say together."""
