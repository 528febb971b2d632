"""A plain torch_geometric training script, and the five lines that turn its GNN into an MLP that needs no graph.

Your model, your loop, your Data stay as they are. The lines with `# structkd` are the change.

    python examples/pyg_training.py                        digits as a nearest-neighbour graph, embedded
    python examples/pyg_training.py --root DIR             Planetoid's Cora below DIR
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv

from structkd import graph  # structkd


class Gcn(nn.Module):
    def __init__(self, features: int, classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = GCNConv(features, hidden), GCNConv(hidden, classes)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = dropout(self.first(x, edge_index).relu(), 0.5, self.training)
        return self.second(x, edge_index)


def load(root: str | None) -> Data:
    """Cora when there is a folder for it, else scikit-learn's digits."""
    if root is not None:
        from torch_geometric.datasets import Planetoid
        from torch_geometric.transforms import NormalizeFeatures

        return Planetoid(root, "Cora", transform=NormalizeFeatures())[0]
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    x, y = load_digits(return_X_y=True)
    edges = [torch.from_numpy(ends).long() for ends in kneighbors_graph(x, 10).nonzero()]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    data = Data(x=torch.tensor(x / 16, dtype=torch.float32), edge_index=torch.stack(edges), y=torch.tensor(y))
    for name, low, high in (("train_mask", 0, 60), ("val_mask", 60, 260), ("test_mask", 260, len(y))):
        data[name] = torch.zeros(len(y), dtype=torch.bool).index_fill(0, order[low:high], True)
    return data


def train(model: Gcn, data: Data, epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        optimiser.zero_grad()
        cross_entropy(model(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask]).backward()
        optimiser.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data = load(arguments.root)
    model = Gcn(data.num_features, int(data.y.max()) + 1)
    train(model, data, arguments.epochs)
    with torch.no_grad():
        logits = model(data.x, data.edge_index)
    print(f"GNN: {(logits.argmax(1) == data.y)[data.test_mask].float().mean():.4f}")

    task = graph.GraphTask.from_pyg(data, name="mine")  # structkd
    config = graph.DistillConfig(method="ff-g2m", epochs=arguments.epochs)  # structkd
    result = graph.distill(task, logits, config, seed=0)  # structkd
    student = result.student  # structkd: a torch module, x -> logits, no edge_index
    with torch.no_grad():
        answers = student(data.x)
    print(f"MLP: {(answers.argmax(1) == data.y)[data.test_mask].float().mean():.4f}, weights of best validation")


if __name__ == "__main__":
    main()
