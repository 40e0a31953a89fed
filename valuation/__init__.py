"""Data valuation: what every training sample, and every institution that owns some, is worth (Pandl et al., arXiv
2305.01657).

knn_shapley.py  the exact Shapley value of every sample for a nearest-neighbour classifier or regression on features
"""

from utils.command import begin_module

begin_module()
