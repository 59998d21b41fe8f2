"""Runs recipes of tinker-cookbook, as published, on a cluster of this machine.

make cookbook                       # all of them, on this client
make cookbook RECIPES="dpo math_rl" # some
make cookbook CLIENT=sdk            # all, through the stock SDK and the gateway
"""
