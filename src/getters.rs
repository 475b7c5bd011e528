//! Methods that only read a field.

/// Methods that read a field: `name: Type;` the field of that name, `name: Type = field;` another one, or one of a field's
/// (`= wait.mode`). `text` reads a text that may be missing; a `&Type` is borrowed, any other value is copied.
macro_rules! getters {
    () => {};
    (@field $self:ident $name:ident) => {
        $self.$name
    };
    (@field $self:ident $name:ident $($field:tt).+) => {
        $self.$($field).+
    };
    ($(#[$doc:meta])* text $name:ident $(= $($field:tt).+)?; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> Option<&str> {
            getters!(@field self $name $($($field).+)?).as_deref()
        }
        getters!($($rest)*);
    };
    ($(#[$doc:meta])* $name:ident: Option<&$type:ty> $(= $($field:tt).+)?; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> Option<&$type> {
            getters!(@field self $name $($($field).+)?).as_ref()
        }
        getters!($($rest)*);
    };
    ($(#[$doc:meta])* $name:ident: &$type:ty $(= $($field:tt).+)?; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> &$type {
            &getters!(@field self $name $($($field).+)?)
        }
        getters!($($rest)*);
    };
    ($(#[$doc:meta])* $name:ident: $type:ty $(= $($field:tt).+)?; $($rest:tt)*) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> $type {
            getters!(@field self $name $($($field).+)?)
        }
        getters!($($rest)*);
    };
}
