"""Data valuation: what every training sample, and every institution that owns some, is worth (Pandl et al., arXiv
2305.01657).

institutions.py  their test sets, and what models are worth on them
truth.py         their Shapley values from all coalitions, each trained (training/coalitions.py)
features.py      what methods compare samples by: a layer of the model of all
methods.py       what comes near it without training them, by ten methods
knn_shapley.py   the exact Shapley value of every sample for a nearest-neighbour classifier or regression on features
comparison.py    how near they come
"""

from utils.command import begin_module

begin_module()
