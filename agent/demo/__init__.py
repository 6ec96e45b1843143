"""podspan.agent.demo: Bookinfo's call graph, traced on this machine.

bookinfo.py   who calls whom, and how long each works
topology.py   a network namespace per service, joined by a bridge
processes.py  start a command inside a namespace, and end it for certain
services.py   what runs in each: a plain server that forwards no header
verify.py     pure: is this the trace that these calls must give?
command.py    all of it in order: `podspan demo`
"""
