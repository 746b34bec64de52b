"""What the project measures itself with: speed, fidelity, kills and resumes, mutants. No user needs it.

Run as `python -m utils.lab.NAME`. Nothing outside of this room imports it.
"""
