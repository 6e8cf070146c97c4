"""The machine: devices, processes and signals.

cpus          CPUs that this process may use
devices       choice of the device, float32 precision, memory
acceleration  precision, memory format, compilation, threads
processes     distributed processes and their collective operations
signals       graceful shutdown on Ctrl-C, SIGTERM and SIGHUP
hub_access    no long waits for a Hub that cannot be reached
progress      progress of reading files, for display by commands
text          times and long names as text
"""
