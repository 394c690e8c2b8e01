//! Nothing to import: this crate exists for its build script, which cargo runs before it spends
//! minutes compiling `torch-sys` against a libtorch that is not there.
