"""How OpenMP's threads wait between two parallel products, where enclave and worker share cores.

libgomp spins for milliseconds by default, on the cores that the other process needs: that costs more than all keys do.
Threads that sleep at once must be woken for each of the small products of a decoding step, some hundred a token. So
they spin for some microseconds: GPT-2 small on two cores decodes in bfloat16 in 30 ms a token then, and in 40 ms
without. libgomp reads both variables when it is loaded.
"""

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
