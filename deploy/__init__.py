"""Deployment: what the compose file needs beside it, and its rehearsal."""
