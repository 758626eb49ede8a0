"""What the machine is asked: files, signals, processes, the terminal, the hub's switches."""
