//! The commands of `garenne`, one file or folder each.
//!
//! A command gets its parsed arguments and, if it needs the broker, a
//! [`Context`](crate::context::Context); it writes through [`crate::output`] and returns an
//! [`Exit`](crate::error::Exit) or an error. No command ends the process or reads the environment.

pub(crate) mod batch;
pub(crate) mod cancel;
pub(crate) mod completions;
pub(crate) mod dead;
pub(crate) mod doctor;
pub(crate) mod lab;
pub(crate) mod map;
pub(crate) mod notices;
pub(crate) mod submit;
pub(crate) mod task;
pub(crate) mod topology;
