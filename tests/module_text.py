"""What can be read in the text of a compiled module: its loops, and what it sends between devices."""

import re

COLLECTIVE = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def loops(module):
    """Return the text of the body, and of all that it calls, of each loop in a compiled module."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", module, re.M | re.S))

    def whole(name, seen):
        if name in seen or name not in bodies:
            return ""
        seen.add(name)
        return bodies[name] + "".join(whole(n, seen) for n in re.findall(r"%([\w.\-]+)", bodies[name]))

    return [whole(body, set()) for body in re.findall(r"while\(.*?body=%?([\w.\-]+)", module)]


def sent(text):
    """Return (kind, dtype, shape) of each array that a collective gives back."""
    return [
        (kind, dtype, tuple(map(int, re.findall(r"\d+", shape))))
        for result, kind in re.findall(COLLECTIVE, text)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
