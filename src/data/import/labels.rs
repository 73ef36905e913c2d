//! Labels as sources come upon them, image by image: numbers in some sets, names in others.

use std::collections::HashMap;

/// The most classes a source may have: a label is a number from a file, and must not make memory follow it.
pub const MAX_CLASSES: u32 = 1 << 18;

/// The longest name of a class, in bytes.
const MAX_NAME: usize = 1024;

const NONE: u32 = u32::MAX;

/// The label of one image, before it is known what classes there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// It has none.
    None,
    /// The number of a class; -1 is a common way to say that there is none.
    Number(i64),
    /// The name of a class.
    Name(String),
}

/// The labels of a source: 4 bytes an image.
#[derive(Debug, Default)]
pub struct Labels {
    labels: Vec<u32>,
    /// Numbers of the names so far, in the order in which they came.
    names: HashMap<String, u32>,
    highest: Option<u32>,
}

impl Labels {
    /// Adds the label of the next image. One that cannot be used leaves the image without.
    ///
    /// # Errors
    /// The reason, as a clause.
    pub fn push(&mut self, label: Label) -> Result<(), String> {
        let number = self.number(label);
        self.labels.push(number.as_ref().copied().unwrap_or(NONE));
        number.map(drop)
    }

    fn number(&mut self, label: Label) -> Result<u32, String> {
        match label {
            Label::None | Label::Number(-1) => Ok(NONE),
            Label::Number(n) if !self.names.is_empty() => {
                Err(format!("its label {n} is a number where those before are names"))
            }
            Label::Number(n) => {
                let class = u32::try_from(n).ok().filter(|&class| class < MAX_CLASSES);
                let class = class.ok_or_else(|| format!("its label {n} is not in 0 to {}", MAX_CLASSES - 1))?;
                self.highest = self.highest.max(Some(class));
                Ok(class)
            }
            Label::Name(name) if self.highest.is_some() => {
                Err(format!("its label {:?} is a name where those before are numbers", shortened(&name)))
            }
            Label::Name(name) if name.is_empty() || name.len() > MAX_NAME => {
                Err(format!("the name of its class has {} bytes, not 1 to {MAX_NAME}", name.len()))
            }
            Label::Name(name) => {
                let next = self.names.len() as u32;
                if next == MAX_CLASSES && !self.names.contains_key(&name) {
                    return Err(format!("there are more than {MAX_CLASSES} names of classes"));
                }
                Ok(*self.names.entry(name).or_insert(next))
            }
        }
    }

    /// The images so far.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Label of image `i`.
    pub fn get(&self, i: usize) -> Option<u32> {
        Some(self.labels[i]).filter(|&label| label != NONE)
    }

    /// Gives names their final numbers, in the order of the alphabet, and returns the classes. Numbers up to the highest
    /// are classes of that name.
    pub fn finish(&mut self) -> Vec<String> {
        if let Some(highest) = self.highest {
            return (0..=highest).map(|class| class.to_string()).collect();
        }
        let mut names: Vec<(String, u32)> = std::mem::take(&mut self.names).into_iter().collect();
        names.sort();
        let mut places = vec![NONE; names.len()];
        for (place, (_, number)) in names.iter().enumerate() {
            places[*number as usize] = place as u32;
        }
        for label in self.labels.iter_mut().filter(|label| **label != NONE) {
            *label = places[*label as usize];
        }
        names.into_iter().map(|(name, _)| name).collect()
    }
}

/// A text from a file, fit for a message.
pub fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_by_the_alphabet() {
        let mut labels = Labels::default();
        for name in ["wolf", "ant", "wolf", "Bee"] {
            labels.push(Label::Name(name.into())).unwrap();
        }
        labels.push(Label::None).unwrap();
        assert!(labels.push(Label::Number(3)).unwrap_err().contains("a number where those before are names"));
        assert_eq!(labels.finish(), ["Bee", "ant", "wolf"]);
        let found: Vec<_> = (0..labels.len()).map(|i| labels.get(i)).collect();
        assert_eq!(found, [Some(2), Some(1), Some(2), Some(0), None, None]);
    }

    #[test]
    fn numbers_are_classes_up_to_the_highest() {
        let mut labels = Labels::default();
        for n in [2, -1, 0] {
            labels.push(Label::Number(n)).unwrap();
        }
        for n in [-2, i64::from(MAX_CLASSES), i64::MAX] {
            assert!(labels.push(Label::Number(n)).unwrap_err().contains("is not in 0 to 262143"));
        }
        assert!(labels.push(Label::Name("ant".into())).is_err());
        assert_eq!(labels.finish(), ["0", "1", "2"]);
        assert_eq!((labels.get(0), labels.get(1), labels.get(3), labels.len()), (Some(2), None, None, 7));
    }
}
