"""The ALOHA simulation: the environment that data and evaluation share, and the scripted expert.

Importing the package settles how MuJoCo renders (see gl.py), because dm_control does so when it is imported.
"""

from openpi_port.sim import gl

gl.choose()
