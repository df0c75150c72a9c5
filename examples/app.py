"""The demo page as a hosted Space: this file as app.py, and `ghost-resnet[demo]` in requirements.txt."""

from ghost_resnet.demo import launch

if __name__ == "__main__":
    launch()
