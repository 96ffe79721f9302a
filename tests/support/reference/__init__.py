"""How it was decided who starts and who is unloaded before `scheduling.decision` did: kept as it
was, so that the replays can hold the one against the other. Not to be mended, nor used elsewhere.
"""
