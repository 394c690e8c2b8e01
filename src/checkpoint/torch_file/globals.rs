//! The list of functions and classes that a file may name. What they make is decided in
//! `calls.rs`; every other name refuses the file.

use super::tensor::Dtype;

/// A harmless function or class, or several that make the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    /// `OrderedDict`, `dict` and their like: made empty, of pairs, or of a dict.
    Dict,
    /// `defaultdict`: like it, with a factory in front, which is left out.
    DefaultDict,
    List,
    Tuple,
    Set,
    Bytes,
    /// `_codecs.encode`: how protocol 2 spells bytes.
    Encode,
    Namespace,
    Path,
    /// A class that stands for itself.
    Type,
    Dtype(Dtype),
    /// A storage class and its elements; bytes for an untyped one.
    Storage(Dtype),
    Device,
    /// `torch.serialization._get_layout`.
    Layout,
    RebuildTensor,
    RebuildTensorV3,
    RebuildParameter,
    RebuildFromType,
    NumpyScalar,
    NumpyDtype,
    NumpyArray,
    Complex,
}

/// The list of harmless names.
pub(super) fn find(module: &str, name: &str) -> Option<Global> {
    let module = match module {
        "__builtin__" => "builtins",                         // Python 2
        "numpy._core.multiarray" => "numpy.core.multiarray", // numpy 2
        "numpy._core.numeric" => "numpy.core.numeric",
        other => other,
    };
    Some(match (module, name) {
        ("collections", "OrderedDict" | "Counter") | ("builtins", "dict") => Global::Dict,
        (
            "lightning.fabric.utilities.data"
            | "lightning_fabric.utilities.data"
            | "pytorch_lightning.utilities.parsing"
            | "lightning.pytorch.utilities.parsing",
            "AttributeDict",
        ) => Global::Dict,
        ("collections", "defaultdict") => Global::DefaultDict,
        ("builtins", "list") => Global::List,
        ("builtins", "tuple") | ("torch", "Size") => Global::Tuple,
        ("builtins", "set" | "frozenset") => Global::Set,
        ("builtins", "bytes" | "bytearray") => Global::Bytes,
        ("builtins", "complex") => Global::Complex,
        ("builtins", "int" | "float" | "str" | "bool") => Global::Type,
        ("_codecs", "encode") => Global::Encode,
        ("argparse" | "jsonargparse.namespace" | "jsonargparse._namespace", "Namespace") => {
            Global::Namespace
        }
        (
            "pathlib" | "pathlib._local",
            "PosixPath" | "PurePosixPath" | "WindowsPath" | "PureWindowsPath" | "Path" | "PurePath",
        ) => Global::Path,
        ("torch", "Tensor") | ("torch.nn.parameter", "Parameter") | ("numpy", "ndarray") => {
            Global::Type
        }
        ("torch", "device") => Global::Device,
        ("torch.serialization", "_get_layout") => Global::Layout,
        ("torch" | "torch.storage", "UntypedStorage" | "_UntypedStorage") => {
            Global::Storage(Dtype::Uint8)
        }
        ("torch", name) => match Dtype::from_storage(name) {
            Some(dtype) => Global::Storage(dtype),
            None => Global::Dtype(Dtype::from_name(name)?),
        },
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorV3,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Global::RebuildParameter
        }
        ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
        ("numpy.core.multiarray", "scalar") => Global::NumpyScalar,
        ("numpy.core.multiarray", "_reconstruct") | ("numpy.core.numeric", "_frombuffer") => {
            Global::NumpyArray
        }
        ("numpy", "dtype") => Global::NumpyDtype,
        _ => return None,
    })
}
