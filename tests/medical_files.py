"""Small folders in the exact formats of NIH ChestX-ray14, CheXpert and MIMIC-CXR-JPG."""

from __future__ import annotations

import gzip
from pathlib import Path

from PIL import Image

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
MIMIC_HEADER = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,"
    "Height],OriginalImagePixelSpacing[x,y],"
)


def picture(file: Path, value: int = 128, size: tuple[int, int] = (8, 8)) -> Path:
    """A grey picture, its folders made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(file)
    return file


def nih(root: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Data_Entry_2017.csv of (picture, findings, patient), as it was published: with a comma at the end of every line.
    Pictures lie in images_001/images and images_002/images in turn; 'Mass' is bright, 'Nodule' bright on the left."""
    lines = [NIH_HEADER]
    for i, (name, findings, patient) in enumerate(rows):
        lines.append(f"{name},{findings},0,{patient},058Y,M,{('PA', 'AP')[i % 2]},2682,2749,0.143,0.143,")
        file = picture(root / f"images_00{1 + i % 2}" / "images" / name, 60 + 100 * ("Mass" in findings) + i % 7)
        if "Nodule" in findings:
            with Image.open(file) as plain:
                plain.paste(250, (0, 0, 4, 8))
                plain.save(file)
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root


def chexpert(root: Path, train: list[tuple[str, str, dict[str, str]]], valid: list[tuple[str, str, dict[str, str]]]):
    """train.csv and valid.csv of (patient, study/view, findings) and the pictures that they name."""
    for name, rows in (("train", train), ("valid", valid)):
        lines = [CHEXPERT_HEADER]
        for patient, view, findings in rows:
            path = f"{name}/{patient}/{view}"
            values = [findings.get(column, "") for column in CHEXPERT_HEADER.split(",")[5:]]
            lines.append(",".join([f"CheXpert-v1.0-small/{path}", "Female", "68", "Frontal", "AP", *values]))
            picture(root / path)
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root


def mimic(root: Path, studies: list[tuple[str, str, dict[str, str]]], pictures: list[tuple[str, str, str, str]]):
    """The table of findings by study (subject, study, findings), and the split by picture (dicom, study, subject,
    split) with the pictures."""
    lines = [MIMIC_HEADER]
    for subject, study, findings in studies:
        lines.append(",".join([subject, study, *(findings.get(name, "") for name in MIMIC_HEADER.split(",")[2:])]))
    root.mkdir(exist_ok=True)
    with gzip.open(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    for dicom, study, subject, _ in pictures:
        picture(root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg")
    with gzip.open(root / "mimic-cxr-2.0.0-split.csv.gz", "wt") as file:
        file.write("\n".join(["dicom_id,study_id,subject_id,split", *map(",".join, pictures)]) + "\n")
    return root
