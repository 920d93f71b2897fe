"""What `launch/compile.py` is made of: absent hardware, the step's program, and what it says."""
