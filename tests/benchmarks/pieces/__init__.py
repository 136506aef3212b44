"""What the processes of a bench do, a module each: `measure(arguments) -> figures` behind `process.answer`.

Figures carry their unit in their name. Peers are used as their documentation shows, at their defaults except
for what the case fixes for all.
"""
