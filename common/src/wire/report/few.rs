//! A list that is refused where it becomes too long: four bytes can be a report of some hundred.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::super::MAX_REPORTS;

/// At most [`MAX_REPORTS`] items, if it was read; whoever writes one minds the limit.
#[derive(Serialize)]
pub(super) struct Few<T>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(FewVisitor(PhantomData))
    }
}

struct FewVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for FewVisitor<T> {
    type Value = Few<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_REPORTS} reports")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Few<T>, A::Error> {
        let mut few = vec![];
        while let Some(item) = list.next_element()? {
            if few.len() == MAX_REPORTS {
                return Err(serde::de::Error::invalid_length(few.len() + 1, &self));
            }
            few.push(item);
        }
        Ok(Few(few))
    }
}
