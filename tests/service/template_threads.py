"""A module of `test_template` that a template cannot import."""

import threading
import time

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
