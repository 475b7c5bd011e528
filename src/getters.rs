//! Methods that only read a field.

/// Methods that read the field of the same name: `text name;` a text, `name: &Type;` a reference, `name: Type;` a
/// value that is copied.
macro_rules! getters {
    () => {};
    ($(#[$doc:meta])* text $name:ident; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> Option<&str> {
            self.$name.as_deref()
        }
        getters!($($rest)*);
    };
    ($(#[$doc:meta])* $name:ident: &$type:ty; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> &$type {
            &self.$name
        }
        getters!($($rest)*);
    };
    ($(#[$doc:meta])* $name:ident: $type:ty; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> $type {
            self.$name
        }
        getters!($($rest)*);
    };
}
