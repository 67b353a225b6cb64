"""The driver: runs notebooks, keeps what they leave, draws and checks it. Never imports torch."""
