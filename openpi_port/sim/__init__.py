"""The ALOHA simulation: the environment that data and evaluation share, and the scripted expert."""
