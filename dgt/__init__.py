"""Dynamic Group Transformer: the model and the system that trains it.

`import dgt` registers the models with timm, as in `timm.create_model("dgt_tiny")`. It needs torch and timm only.
"""

from dgt import models as models
