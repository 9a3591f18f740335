"""What an instance decides: admission, preemption, lending, migration.

Pure: no torch, no MPI, no clock. The simulator and the tests drive the same code as the ranks.
"""
